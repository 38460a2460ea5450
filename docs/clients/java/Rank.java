// Ranks candidates for a user with recent events. Build and run: docs/other_languages.md.
import static java.util.Arrays.asList;

import aif_jax.v1.PreRankingGrpc;
import aif_jax.v1.Preranking.Candidates;
import aif_jax.v1.Preranking.Column;
import aif_jax.v1.Preranking.Id;
import aif_jax.v1.Preranking.RankRequest;
import aif_jax.v1.Preranking.RankResponse;
import aif_jax.v1.Preranking.User;
import io.grpc.ManagedChannel;
import io.grpc.netty.NettyChannelBuilder;
import java.util.concurrent.TimeUnit;

public class Rank {
  public static void main(String[] arguments) {
    ManagedChannel channel = NettyChannelBuilder.forTarget(arguments[0]).usePlaintext().build();
    User user =
        User.newBuilder()
            .setId(Id.newBuilder().setText("ann"))
            .setNow(1700000900)
            .putEvents("item", Column.newBuilder().addAllIntegers(asList(17L, 1017L)).build())
            .putEvents("time", Column.newBuilder().addAllIntegers(asList(1700000000L, 1700000050L)).build())
            .build();
    RankRequest request =
        RankRequest.newBuilder()
            .setUser(user)
            .setCandidates(Candidates.newBuilder().addAllIds(asList(17L, 1017L, 2017L, 3017L)))
            .setK(2)
            .build();
    RankResponse answer =
        PreRankingGrpc.newBlockingStub(channel).withDeadlineAfter(10, TimeUnit.SECONDS).rank(request); // the engine's budget
    for (int i = 0; i < answer.getBest().getIdsCount(); i++)
      System.out.println(answer.getBest().getIds(i) + " " + answer.getScores(i));
    channel.shutdownNow();
  }
}
