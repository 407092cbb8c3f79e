"""Did a prediction come true? For `shapedpo verify`: [`comparison`] lays it beside what was observed, [`report`] writes that down."""
