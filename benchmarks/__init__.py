"""What the README's figures come from. Every claim is a ratio of two things measured side by side in one run."""
