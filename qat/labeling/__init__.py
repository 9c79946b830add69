"""Making soft labels with a teacher."""
