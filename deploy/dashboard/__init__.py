"""Shows a run in a browser, while it goes on and afterwards. Loads no torch and changes nothing in a run's files."""
