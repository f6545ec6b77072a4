"""Commands beside those of `launcher.cli`, a module each, named in its `_MODULES`. They import little but click until they are called."""
