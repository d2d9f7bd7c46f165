"""The inner loop and what runs it; nothing here knows a learner."""
