"""tricks: what a small budget asks for, and the paper does not have. A preset chooses them."""
