"""Group -> new weights. Never imports the actor."""
