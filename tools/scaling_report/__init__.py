"""How a series of runs scales: table, plots, TensorBoard."""
