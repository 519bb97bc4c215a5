"""How a step is spread over processes and memory. Nothing outside this package knows which strategy runs."""
