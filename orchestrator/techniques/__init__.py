"""The rules of good training: schedules, initialization, losses, stopping."""
