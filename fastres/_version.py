"""The one place that holds the version; packaging reads it as text, without importing torch."""

__version__ = "0.1.0"
