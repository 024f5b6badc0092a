"""The roles as plain classes, testable without Ray: teacher, critic, generator, evaluator, and the preflight."""
