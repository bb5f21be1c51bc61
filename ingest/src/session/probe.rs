//! What the tables of sessions are offered to find out whether they still take what they took before.

use deadpool_postgres::Client;

use crate::failure::WriteError;
use crate::schema::{self, Purpose};

/// A new row with the values of a stored one, or made-up values when there is none, for each table. Changing a stored row
/// would wait for whoever has locked it.
///
/// # Errors
/// The tables'.
pub(super) async fn offer(client: &Client) -> Result<(), WriteError> {
    const SESSIONS: &str = "WITH stored AS (SELECT user_id, connection_status, last_activity FROM public.user_sessions LIMIT 1), \
        known AS (SELECT * FROM stored UNION ALL SELECT 'tier0-probe', 'active', now() WHERE NOT EXISTS (SELECT FROM stored)) \
        INSERT INTO public.user_sessions (session_id, user_id, connection_status, last_activity) \
        SELECT 'tier0-probe ' || txid_current(), user_id, connection_status, last_activity FROM known";
    const SITES: &str = "WITH stored AS (SELECT metrics FROM public.site_activity LIMIT 1), \
        known AS (SELECT * FROM stored UNION ALL SELECT '{}'::jsonb WHERE NOT EXISTS (SELECT FROM stored)) \
        INSERT INTO public.site_activity (site_id, timestamp_utc, metrics) \
        SELECT 'tier0-probe ' || txid_current(), now(), metrics FROM known";
    schema::are_ours(client, Purpose::Sessions).await?;
    for (table, sql) in [("user_sessions", SESSIONS), ("site_activity", SITES)] {
        if client.execute(sql, &[]).await? == 0 {
            return Err(WriteError::Unknown(format!(
                "{table} reports success and keeps no row: a trigger, rule or policy?"
            )));
        }
    }
    Ok(())
}
