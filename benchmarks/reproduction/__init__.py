"""The TurboQuant, PolarQuant and QJL papers' own claims, measured again."""
