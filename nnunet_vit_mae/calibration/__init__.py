"""What probabilities mean: thresholds with the right volumes, a temperature, intervals, the Dice to expect."""
