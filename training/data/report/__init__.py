"""The report on a data set: its numbers, some of its pictures, and one page that shows both."""
