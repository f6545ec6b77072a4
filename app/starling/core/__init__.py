"""The ground floor: what the trainer and the launcher both need. Imports the standard library and PyYAML only."""
