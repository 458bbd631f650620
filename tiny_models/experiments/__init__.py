"""One experiment for each claim about RLAIF with PPO; the command is in __main__.py."""
