//! Orders given to agents directly, in an order that an orchestrator would come to only by bad luck.

use failover::protocol::Postmaster;
use serde_json::json;

use crate::fixture::Setup;

/// The order to stop comes while the data is rewritten: it is answered at once, and nothing is started afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halt_during_a_clone_holds_when_the_clone_is_through() {
    let mut fixture = Setup::default().start().await;
    fixture.orchestrator.kill9().await.unwrap();
    let halt = json!({"order": "halt", "how": "fast"});
    let stand =
        |how| json!({"order": "stand", "upstream": fixture.upstream("region1"), "how": how, "slots": []});
    assert_eq!(fixture.order("region2", halt.clone()).await.0, 200);
    let clone = stand("clone");
    let (cloned, halted) = tokio::join!(fixture.order("region2", clone), async {
        fixture
            .agent_until("region2", "cloned", |status| {
                matches!(status.postmaster, Postmaster::Rebuilding { .. })
            })
            .await;
        fixture.order("region2", halt).await
    });
    assert_eq!(halted.0, 200, "{}", halted.1);
    assert_eq!((cloned.0, cloned.1["error"]["code"].as_str()), (409, Some("superseded")), "{}", cloned.1);
    let status = fixture.agent("region2").await;
    assert!(status.is_stopped() && fixture.started("region2").is_none(), "{status:#?}");
    // What the clone brought is whole, and a standby's.
    assert!(status.control.as_ref().is_some_and(|control| control.standby), "{status:#?}");
    let followed = fixture.order("region2", stand("follow")).await;
    assert_eq!(followed.0, 200, "{}", followed.1);
    fixture.orchestrator.restart().await.unwrap();
    fixture.whole().await;
}

/// Both nodes were promoted by hand, each to timeline 2. `pg_rewind` sees the same number on both sides and does nothing;
/// streaming would put one history on top of the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_histories_under_one_timeline_are_not_mixed() {
    let mut fixture = Setup::default().start().await;
    fixture.orchestrator.kill9().await.unwrap();
    let lead = json!({"order": "lead", "wait_for": [], "slots": ["region1", "region2"]});
    for what in [json!({"order": "detach"}), lead.clone()] {
        let (status, body) = fixture.order("region2", what).await;
        assert_eq!(status, 200, "{body}");
    }
    fixture.admin("region2").await.batch_execute("CREATE TABLE stray (a int)").await.unwrap();
    assert_eq!(fixture.order("region1", json!({"order": "halt", "how": "fast"})).await.0, 200);
    std::fs::write(fixture.cluster.nodes[0].data().join("standby.signal"), "").unwrap();
    // Its data is not what it was when the agent looked: it says so first.
    let (status, body) = fixture.order("region1", lead.clone()).await;
    assert_eq!((status, body["error"]["code"].as_str()), (409, Some("changed")), "{body}");
    let (status, body) = fixture.order("region1", lead).await;
    assert_eq!(status, 200, "{body}");
    let db = fixture.admin("region1").await;
    // More than the other has written: it could ask for what follows its own end.
    db.batch_execute("CREATE TABLE mine AS SELECT generate_series(1, 100000) AS a").await.unwrap();
    for region in ["region1", "region2"] {
        assert_eq!(fixture.agent(region).await.timeline(), 2, "the test is one");
    }
    fixture.orchestrator.restart().await.unwrap();
    // Somebody may have acknowledged something on it: a person has to say that it may go.
    fixture.discard("region2").await;
    assert_eq!(fixture.whole().await.current_region, "region1");
    let sql = "SELECT to_regclass('stray') IS NULL AND to_regclass('mine') IS NOT NULL";
    assert!(fixture.ask::<bool>("region2", sql).await, "region2 has region1's history and no other");

    // And an agent that is told to rewind all the same says that nothing was compared, where pg_rewind says that all is well.
    fixture.orchestrator.kill9().await.unwrap();
    // The first marker makes the schema and lets the replication role read files; region1 may not have come to it yet.
    let mark = json!({"order": "mark", "epoch": fixture.agent("region1").await.epoch});
    let (status, body) = fixture.order("region1", mark).await;
    assert_eq!(status, 200, "{body}");
    let rewind =
        json!({"order": "stand", "upstream": fixture.upstream("region1"), "how": "rewind", "slots": []});
    let (status, body) = fixture.order("region2", rewind).await;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(status == 409 && message.contains("on the same timeline"), "{status} {body}");
    assert!(fixture.agent("region2").await.is_stopped());
    fixture.orchestrator.restart().await.unwrap();
    fixture.whole().await;
}
