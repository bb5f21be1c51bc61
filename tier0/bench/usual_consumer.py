"""The usual consumer, as the baseline of `tier0 bench`: paho-mqtt and psycopg2.

One message is one prepared INSERT, a hundred to a transaction. Acknowledges on receipt, as the library does, and so
loses what is not committed when it dies: that is the usual consumer. Prints the number of committed rows after each
transaction. Usage: usual_consumer.py PORT; Postgres by the PG* variables.
"""

import json
import sys

import paho.mqtt.client
import psycopg2
from psycopg2.extras import Json

BATCH = 100
PREPARE = """PREPARE reading (text, text, text, timestamptz, text, jsonb, jsonb, jsonb, jsonb) AS
INSERT INTO device_telemetry (device_id, device_type, site_id, timestamp_utc, firmware, metrics, status, location, tags)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"""
EXECUTE = "EXECUTE reading (%s, %s, %s, %s, %s, %s, %s, %s, %s)"

database = psycopg2.connect("")
cursor = database.cursor()
cursor.execute(PREPARE)
database.commit()
committed = 0
open_rows = 0


def on_connect(client, userdata, flags, code):
    client.subscribe("og/field/#", qos=1)


def on_subscribe(client, userdata, packet, granted):
    print("subscribed", flush=True)


def on_message(client, userdata, message):
    global committed, open_rows
    reading = json.loads(message.payload)
    cursor.execute(
        EXECUTE,
        (
            reading["device_id"],
            reading["device_type"],
            reading["site_id"],
            reading["timestamp_utc"],
            reading.get("firmware"),
            Json(reading["metrics"]),
            Json(reading.get("status")),
            Json(reading.get("location")),
            Json(reading.get("tags")),
        ),
    )
    open_rows += 1
    if open_rows == BATCH:
        database.commit()
        committed += open_rows
        open_rows = 0
        print(committed, flush=True)


client = paho.mqtt.client.Client("usual-consumer")
client.on_connect = on_connect
client.on_subscribe = on_subscribe
client.on_message = on_message
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop_forever()
