"""The version of both packages, in one place."""

VERSION = "0.1.0"
