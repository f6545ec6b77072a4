"""Doubles for what cannot be had where tests run: each says what it stands for, and shows nothing about the real one."""
