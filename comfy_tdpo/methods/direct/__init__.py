"""Direct reward gradients: methods that back-propagate a reward through the steps of sampling."""
