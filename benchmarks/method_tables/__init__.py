"""What each token method makes of the features of real models, and what it costs."""
