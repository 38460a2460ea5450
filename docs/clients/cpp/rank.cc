// Ranks candidates for a user with recent events. Build and run: docs/other_languages.md.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <iostream>

#include "preranking.grpc.pb.h"

namespace pb = aif_jax::v1;

int main(int argc, char** argv) {
  auto stub = pb::PreRanking::NewStub(grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials()));

  pb::RankRequest request;
  auto* user = request.mutable_user();
  user->mutable_id()->set_text("ann");
  user->set_now(1700000900);
  auto& events = *user->mutable_events();
  for (long id : {17, 1017}) events["item"].add_integers(id);
  for (long time : {1700000000, 1700000050}) events["time"].add_integers(time);
  for (long id : {17, 1017, 2017, 3017}) request.mutable_candidates()->add_ids(id);
  request.set_k(2);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));  // the engine's budget
  pb::RankResponse response;
  grpc::Status status = stub->Rank(&context, request, &response);
  if (!status.ok()) {
    std::cerr << status.error_message() << "\n";
    return 1;
  }
  for (int i = 0; i < response.best().ids_size(); i++)
    std::cout << response.best().ids(i) << " " << response.scores(i) << "\n";
}
