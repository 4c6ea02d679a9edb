"""The mathematics: pure tensor functions and what each method asks of a batch."""
