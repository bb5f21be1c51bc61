//! What a DBA may do to the tables while readings come in. A batch that counts as committed is in the tables, whole; anything else is
//! an error, and when the act is undone the same batch is stored exactly.

use ingest::batch::Batch as _;
use playground::cluster::Options;
use playground::postgres::Role;

use crate::fixture::{Fixture, message};
use crate::settings::road::commit;

const SWALLOW: &str =
    "CREATE FUNCTION public.swallow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$; ";

struct Act {
    what: &'static str,
    act: String,
    undo: String,
}

fn act(what: &'static str, act: impl Into<String>, undo: impl Into<String>) -> Act {
    Act { what, act: act.into(), undo: undo.into() }
}

fn acts() -> Vec<Act> {
    let trigger = |table: &str, when: &str| {
        format!(
            "{SWALLOW} CREATE TRIGGER swallow BEFORE INSERT ON public.{table} FOR EACH ROW {when} \
             EXECUTE FUNCTION public.swallow()"
        )
    };
    let no_trigger = "DROP FUNCTION public.swallow() CASCADE";
    vec![
        act(
            "a trigger swallows one row",
            trigger("device_telemetry", "WHEN (new.device_id LIKE '%3')"),
            no_trigger,
        ),
        act("a trigger swallows all rows", trigger("device_telemetry", ""), no_trigger),
        act("a trigger swallows letters", trigger("dead_letters", ""), no_trigger),
        act(
            "a rule swallows letters",
            "CREATE RULE swallow AS ON INSERT TO public.dead_letters DO INSTEAD NOTHING",
            "DROP RULE swallow ON public.dead_letters",
        ),
        act(
            "a rule swallows rows",
            "CREATE RULE swallow AS ON INSERT TO public.device_telemetry DO INSTEAD NOTHING",
            "DROP RULE swallow ON public.device_telemetry",
        ),
        act(
            "another unique index, in which two rows collide",
            "CREATE UNIQUE INDEX extra ON public.device_telemetry (site_id, timestamp_utc)",
            "DROP INDEX public.extra",
        ),
        act(
            "rights are taken away",
            "REVOKE INSERT ON public.device_telemetry FROM tier0",
            "GRANT INSERT ON public.device_telemetry TO tier0",
        ),
        act(
            "rights on letters are taken away",
            "REVOKE INSERT ON public.dead_letters FROM tier0",
            "GRANT INSERT ON public.dead_letters TO tier0",
        ),
        act(
            "the table has another name",
            "ALTER TABLE public.device_telemetry RENAME TO gone",
            "ALTER TABLE public.gone RENAME TO device_telemetry",
        ),
        act(
            "the table is in another schema",
            "CREATE SCHEMA aside; ALTER TABLE public.device_telemetry SET SCHEMA aside",
            "ALTER TABLE aside.device_telemetry SET SCHEMA public; DROP SCHEMA aside",
        ),
        act(
            "a policy refuses rows, and hides them",
            "ALTER TABLE public.device_telemetry ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; \
             CREATE POLICY hides ON public.device_telemetry USING (device_id NOT LIKE '%3')",
            "DROP POLICY hides ON public.device_telemetry; \
             ALTER TABLE public.device_telemetry DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY",
        ),
        act(
            "a column is gone",
            "ALTER TABLE public.device_telemetry RENAME tags TO labels",
            "ALTER TABLE public.device_telemetry RENAME labels TO tags",
        ),
        act(
            "the partitions are dropped, with what is in them",
            "DO $$DECLARE part text; BEGIN \
             FOR part IN SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'public.device_telemetry'::regclass \
             LOOP EXECUTE 'DROP TABLE ' || part; END LOOP; END$$",
            "SELECT 1",
        ),
    ]
}

/// Readings that are new, readings that are stored, and a message that is none.
async fn check(
    fixture: &mut Fixture,
    admin: &playground::postgres::Db,
    number: usize,
    act: &Act,
    again: bool,
) {
    admin.batch_execute("TRUNCATE public.device_telemetry, public.dead_letters").await.unwrap();
    let first = 1_000 * (number + 1);
    let mut sent: Vec<String> = (first..first + 10).map(|device| format!("D-{device}")).collect();
    // Times of their own, but for those that another unique index would refuse.
    let at_us = |device: usize| {
        let collides = if again { device >= first + 10 } else { device == first + 9 };
        i64::try_from(if collides { device - if again { 10 } else { 1 } } else { device }).unwrap()
    };
    let mut batch = fixture.batch();
    for device in first..first + 10 {
        let delivery = fixture.delivery(device, at_us(device), "{}");
        fixture.push(&mut batch, delivery);
    }
    if again {
        batch.seal();
        commit(&fixture.database, &mut batch).await.unwrap();
        // Twice as many, half of them stored: the merge path.
        batch = fixture.batch();
        fixture.forget();
        for device in first..first + 20 {
            let delivery = fixture.delivery(device, at_us(device), "{}");
            fixture.push(&mut batch, delivery);
        }
        sent = (first..first + 20).map(|device| format!("D-{device}")).collect();
    }
    fixture.push(&mut batch, message(first, "not json"));
    batch.seal();

    let topics: Vec<String> = sent.iter().map(|device| format!("og/field/S/turbine/{device}")).collect();
    // A row that alone is refused among good ones is its own fault: then it is a letter.
    let accounted = async || {
        let sql = "SELECT (SELECT count(*) FROM public.device_telemetry WHERE device_id = ANY($1)), \
                   (SELECT count(*) FROM public.dead_letters WHERE topic = ANY($2) AND reason <> 'not_json'), \
                   (SELECT count(*) FROM public.dead_letters WHERE topic = ANY($2) AND reason = 'not_json')";
        let row = admin.query_one(sql, &[&sent, &topics]).await.unwrap();
        let (rows, refused, broken): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        (rows + refused, broken)
    };
    let whole = (i64::try_from(sent.len()).unwrap(), 1);
    let what = act.what;
    admin.batch_execute(&act.act).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let outcome = commit(&fixture.database, &mut batch).await;
    if outcome.is_ok() {
        assert_eq!(accounted().await, whole, "{what}, again: {again}: counts as committed");
    }
    admin.batch_execute(&act.undo).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    if let Err(words) = outcome {
        commit(&fixture.database, &mut batch)
            .await
            .unwrap_or_else(|error| panic!("{what}: {words}, then {error}"));
        assert_eq!(accounted().await, whole, "{what}, again: {again}: {words}");
    }
}

#[tokio::test]
async fn whatever_is_done_to_the_tables_nothing_counts_as_committed_that_is_not_there() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    for (number, act) in acts().iter().enumerate() {
        for again in [false, true] {
            // The rows that were stored before are dropped by the last act: there is nothing to compare.
            if again && act.undo == "SELECT 1" {
                continue;
            }
            check(&mut fixture, &admin, 2 * number + usize::from(again), act, again).await;
        }
    }
}
