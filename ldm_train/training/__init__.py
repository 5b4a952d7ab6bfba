HEALTH = "health.json"  # in a stage's folder: what the checks of training have found
