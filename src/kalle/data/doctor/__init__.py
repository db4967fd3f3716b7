"""What is wrong with a prepared corpus: measured item by item, judged check by check, drawn, and left out on request."""
