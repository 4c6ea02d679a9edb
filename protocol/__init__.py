"""What crosses the wire between actors and the learner, and the recipe both sides read. Imports neither side."""
