"""The report page, by part: what a run has left, its course, curves, previews, configuration."""
