"""The ops in plain torch: oracle of the tests, and what runs where no kernel can."""
