"""How fast workers are: small programs run on them with a clock beside every op, and where the answers are kept."""
