"""What tracing costs, measured side by side: `make bench`. Not part of the installed package."""
