"""What a run says of itself while it goes on: one table of metrics, and a sample of the present about once a second."""
