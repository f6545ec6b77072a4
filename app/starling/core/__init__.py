"""The ground floor: code for both the trainer and the launcher. Imports the standard library and PyYAML only."""
