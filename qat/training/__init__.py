"""Training: the Lightning module, losses, regularizers, schedules, the teacher."""
