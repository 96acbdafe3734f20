"""What is installed and usable here, with the remedy for what is not."""
