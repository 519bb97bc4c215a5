"""For the tests of genscale and of what is built on it: real runs in processes of their own, and a look at what they left."""
