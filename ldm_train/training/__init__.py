HEALTH = "health.json"  # in a stage's folder: the findings of the health checks during training
