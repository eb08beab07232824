"""The loss and the loop; they train whatever requires gradients."""
