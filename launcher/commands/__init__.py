"""Commands beside those of `launcher.cli`, a module each. They import nothing but click until they are called."""
