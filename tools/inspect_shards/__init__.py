"""What a dataset holds, in numbers and pictures, and whether it is whole."""
