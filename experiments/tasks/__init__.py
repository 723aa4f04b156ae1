"""Does Y-Drop help on small sets of text, pictures, tables and time series, against tuned dropout?"""
