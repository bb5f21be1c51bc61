//! What happens to acknowledgements while there is no connection to send them on.

use ingest::settlement::Settlements;

/// Takes what becomes due until `until`, and returns how many acknowledgements are void for it: the broker delivers
/// those messages again, and their identity makes that harmless. Ends early when the writers have ended.
pub async fn void_until(settlements: &Settlements, until: impl Future<Output = ()>) -> u64 {
    let mut void = 0;
    tokio::pin!(until);
    loop {
        tokio::select! {
            () = &mut until => return void,
            settled = settlements.take() => match settled {
                Some(settled) => void += settled.len() as u64,
                None => return void,
            },
        }
    }
}
