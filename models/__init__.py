"""Models that a plan can train per subject, and the students that are deployed."""
