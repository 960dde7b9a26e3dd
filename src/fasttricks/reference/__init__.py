"""The ops in plain torch: the oracle of the tests, and the fallback if there is no kernel."""
