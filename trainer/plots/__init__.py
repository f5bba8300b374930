"""What is drawn of a run: curves, neurons, sample grids."""
