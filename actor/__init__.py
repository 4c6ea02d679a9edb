"""Prompt -> scored group. Runs vLLM under Ray, or by hand; never imports the learner."""
