"""Making packed models: what must stay exact, which type each tensor takes, and the writing of them."""
