"""Plans: devices and costs, the cut into tasks, their placement and their order."""
