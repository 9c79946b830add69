"""The Lightning module and what it trains with: losses, regularizers, schedules, a teacher."""
