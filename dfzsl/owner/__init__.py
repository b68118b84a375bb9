"""What a data owner does with a teacher: import a trained head, serve a teacher."""
