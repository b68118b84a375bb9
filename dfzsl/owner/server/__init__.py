"""HTTP server that answers queries to a teacher, with tokens and query budgets."""
